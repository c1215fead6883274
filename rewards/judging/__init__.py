"""What a judge needs: questions, their service, and a model that answers them with a gradient."""
