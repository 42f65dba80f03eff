"""Triton kernels. Installed as ``pudnet.kernels``; they take pointers and integers and know nothing of pudnet's classes."""
