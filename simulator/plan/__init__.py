"""What will be made: the configuration, the tree of models, and what it costs."""
