"""What models are judged on: real text, procedural reasoning, recall over documents."""
