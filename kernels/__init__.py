"""Triton kernels. Installed as ``pudnet.kernels``; they know torch and Triton and nothing of pudnet's classes."""
