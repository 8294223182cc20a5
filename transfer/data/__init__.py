"""What is read: data sets, augmentation and loaders, a pure function of seed, epoch and position."""
