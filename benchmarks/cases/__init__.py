"""One module per family; each lists its cases in ``CASES``. A new module here is found without registration."""
