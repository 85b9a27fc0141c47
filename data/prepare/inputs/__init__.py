"""What can be prepared: files of several formats, each of which yields raw samples."""
