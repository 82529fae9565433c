"""Quality, speed and memory of a model beside its baseline, each measure defined once."""
