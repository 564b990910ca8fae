"""Other packages' calls on our operators, one package a folder."""
