"""Work in tasks, results kept as they are made, atomic files, what a result records of itself."""
