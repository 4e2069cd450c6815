"""`python -m bitswitch`."""

from bitswitch.cli import main

if __name__ == "__main__":
    main()
