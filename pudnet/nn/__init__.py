"""Parameters of the hypernetwork, one stage a file, built only from ops."""
