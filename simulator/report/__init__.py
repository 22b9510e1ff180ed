"""The reports: tables, plots and pages, made from the records alone."""
