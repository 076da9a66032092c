"""`smolds ladder`: plan, train and fit small runs of a family of models, to predict a large one."""
