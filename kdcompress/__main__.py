"""`python -m kdcompress`."""

from kdcompress.cli import main

if __name__ == "__main__":
    main()
