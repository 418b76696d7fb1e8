"""What the commands do. Imported, with torch, after their options have been parsed."""
