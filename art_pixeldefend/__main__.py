"""``python -m art_pixeldefend``: what ``torchrun -m`` starts."""

from art_pixeldefend.cli import main

if __name__ == "__main__":
    main()
