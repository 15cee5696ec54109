"""One module a page; `show()` draws it. (A folder called "pages" would switch on Streamlit's older page finder.)"""
