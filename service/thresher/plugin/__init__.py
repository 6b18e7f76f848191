"""The plug-in way: a user's own TorchRec model and training loop. `thresher/__init__.py` says what is promised."""
