"""Ranks: process groups, layouts, timers, and the watchdog."""
