"""What is read: tables, plots and pages, from the records alone."""
