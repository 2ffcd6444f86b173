"""One module per family; each lists its cases in ``CASES``. A new module is found by itself."""
