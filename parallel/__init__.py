"""Who holds what: splits, stages and layouts, and the parallel layers built on them."""
