"""`python -m strop`: the command line, where the console script is not on the path."""

from strop.cli import main

if __name__ == "__main__":
    main()
