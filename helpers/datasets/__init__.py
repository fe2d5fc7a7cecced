"""The vendored data sets, where they come from (`sources.json`) and the script that makes them (`make.py`)."""
