"""What runs came to: a page for one (`report`), a table and a picture for several (`compare`)."""
