"""`trl-opsd bench`: the loss and the training step beside their peers, each contender in a process of its own."""
