"""Learning curves over seeds: runs become records, records become means with intervals, these become a figure.

The data goes one way: `runs` and `table_file` read, `seed_curve` is what they give, `aggregate` takes the
means, `figure` and `page` show them, and `command` does all of it in turn.
"""
