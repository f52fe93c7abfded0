"""What leaves the house: HTML report, figures, model card. Pure functions of JSON and PNG files."""
