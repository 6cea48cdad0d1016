"""Make other libraries' downloads once per job, without a change to the code that calls them."""
