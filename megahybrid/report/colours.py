"""Colours that colour-blind readers tell apart, for pictures and for interactive charts."""

# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is too light on white,
# and without black, which a dark page would hide.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
