"""`python -m distinf`."""

from distinf.cli import main

if __name__ == "__main__":
    main()
