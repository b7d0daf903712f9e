// Keeps the address at the page's state: `studio.link({name: value})`; an empty value leaves a name out.
// A tab that the address asks for is opened after the first one, whose opening is not to be written down.
window.studio = {
  asked: new URLSearchParams(location.search).get('tab'),
  tab(name) { if (this.asked === null || this.asked === name) this.link({ tab: name }); },
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
