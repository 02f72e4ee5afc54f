"""What the sources hold.

sources    from the path of a source to a list of clips with captions, or with the reason why one cannot be taken
media      where the bytes of a clip are: a file, a member of an archive, a value of a table
archives   tars and tables that hold clips
metadata   tables of clips: .csv, .tsv, .json, .jsonl
text       captions, tables and prompts as text, by one policy
names      files by names that another system wrote
shapes     the embedded data sets
spool      lines that are written once and read many times
refused    what is said when the system refuses to let us read a file
"""
