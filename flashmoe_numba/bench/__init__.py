"""What stands behind `flashmoe run`: start ranks, meet, time a layer beside BLAS, check it, report."""
