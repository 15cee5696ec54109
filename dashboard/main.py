"""The dashboard's frame: navigation, style, banner; each page draws itself."""

import streamlit as st

from dashboard.desk import mending
from dashboard.markup import stylesheet
from dashboard.views import compare, datasets, home, models, runs

st.set_page_config(
    page_title="Safelight",
    page_icon="🔴",
    layout="wide",
    initial_sidebar_state="collapsed",
    menu_items={"About": "Safelight: from a folder of pictures to a reviewed image model."},
)
page = st.navigation(
    [
        st.Page(home.show, title="Home", url_path="home", default=True),
        st.Page(datasets.show, title="Datasets", url_path="datasets"),
        st.Page(runs.show, title="Runs", url_path="runs"),
        st.Page(compare.show, title="Compare", url_path="compare"),
        st.Page(models.show, title="Models", url_path="models"),
    ],
    position="top",
)
stylesheet()
with mending():
    page.run()
