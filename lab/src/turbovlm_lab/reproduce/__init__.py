"""The paper's tables and figures as studies: declared, run with a user's models and data or built-in ones, reported."""
