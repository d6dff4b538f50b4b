"""The commands of deploy.py, one file each: read the options, call one function, print."""
