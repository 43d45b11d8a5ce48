"""kdcompress distills several trained image classifiers into one small student and ships it to the edge."""

__version__ = "0.1.0"
