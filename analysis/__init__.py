"""Read run folders, compare runs, fit scaling laws, draw plots and reports. Needs neither torch nor a GPU."""
