"""`python -m bitswitch`."""

from bitswitch.start import main

if __name__ == "__main__":
    main()
