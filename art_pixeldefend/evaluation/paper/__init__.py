"""Parts that only the tables and figures of Song et al. (ICLR 2018) need."""
