"""Whole journeys: the verbs that join several rooms of the house and show the outcome."""
