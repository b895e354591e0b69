"""Being here, this file puts the root on the path, so that plain `pytest` finds the modules, too."""
