"""What setup.py and the Makefile call: nothing here is installed."""
