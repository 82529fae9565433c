"""Faults and fuzz: killed runs, full disks, clocks, rivals, and inputs that nobody would write."""
