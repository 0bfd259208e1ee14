"""The models, one in each file. `vnca/model.py` says what a file has."""
