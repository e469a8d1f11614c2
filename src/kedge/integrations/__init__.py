"""Parts of Kedge for other libraries' trainers; each module needs the library that it is named after."""
