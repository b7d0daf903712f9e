// Keeps the address at the page's state: `studio.link({name: value})`; an empty value leaves a name out.
window.studio = {
  link(values) {
    const query = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(values)) {
      if (value === '' || value === null || value === undefined) query.delete(name);
      else query.set(name, value);
    }
    const text = query.toString();
    history.replaceState(history.state, '', text ? `${location.pathname}?${text}` : location.pathname);
  },
};
