"""Tells `pip install .` what this is."""

raise SystemExit("This is a checkout to run from, not a package: pip install -r requirements.txt && python test_IVF.py")
