"""GitHub repositories with a hubconf.py, as torch.hub.load fetches and keeps them."""
