"""What elastic training costs and gives: runs side by side, and their report."""
