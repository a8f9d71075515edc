"""What the experiments share: run folders and files, devices and processes, classifiers, and what is attacked."""
