"""The smallest driver, to be copied: an image classifier pruned in one stage, and how well it knows each class."""
