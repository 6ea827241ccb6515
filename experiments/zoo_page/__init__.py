"""Makes what the package prints of its zoo, and the zoo's page; `python -m experiments.zoo_page` writes both."""
